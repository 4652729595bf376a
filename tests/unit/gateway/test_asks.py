"""What callers send becomes what is asked of the bus: every field has one meaning, and none is dropped silently."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bus.errors import BadArgument
from bus.limits import MAX_CHAIN_NODES
from kvcache.client.prompts import make_prompt
from kvcache.gateway.asks import Ask, Caller, chat_ask, completion_ask
from kvcache.gateway.problems import Problem
from kvcache.gateway.schema import ChatRequest, CompletionRequest, parse

KEYED = Caller(key=b"k" * 32)


def completion(caller: Caller = Caller(), **fields: Any) -> Ask:
    body = json.dumps({"prompt": "hello"} | fields).encode()
    return completion_ask(parse(body, CompletionRequest), caller)


def chat(caller: Caller = Caller(), **fields: Any) -> Ask:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]} | fields).encode()
    return chat_ask(parse(body, ChatRequest), caller, 77)


def test_parameters_reach_sampling_under_their_own_names() -> None:
    given: dict[str, Any] = {
        "n": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5,
        "presence_penalty": 1, "frequency_penalty": -1, "stop_token_ids": [4], "ignore_eos": True, "min_tokens": 2,
        "max_tokens": 9, "seed": 5,
    }  # fmt: skip
    params = completion(**given, stop="end", logit_bias={"12": -3}).params
    assert {name: getattr(params, name) for name in given} == given
    assert (params.stop, params.logit_bias) == ("end", {12: -3.0})


def test_limits_left_out_are_openais_and_the_operators() -> None:
    assert completion().params.max_tokens == 16
    assert chat().params.max_tokens == 77
    assert chat(max_tokens=5).params.max_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=6).params.max_tokens == 6
    assert completion(min_tokens=40).params.max_tokens == 40
    assert completion(temperature=None, stop=None, n=None, seed=None).params.temperature == 1.0


def test_any_64_bit_seed_is_one_of_ours() -> None:
    assert completion(seed=-1).params.seed == 2**63 - 1


def test_logprobs_mean_a_number_for_completions_and_a_flag_for_chats() -> None:
    assert completion().params.logprobs is None
    assert completion(logprobs=0).params.logprobs == 0
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).params.logprobs == 4
    assert chat(logprobs=False).params.logprobs is None


def test_an_echo_with_logprobs_asks_for_the_prompts_and_may_ask_for_nothing_else() -> None:
    """As evaluation harnesses do."""
    assert completion(echo=True).params.prompt_logprobs is None
    both = completion(echo=True, logprobs=1, max_tokens=1)
    assert (both.params.logprobs, both.params.prompt_logprobs, both.is_prompt_only) == (1, 1, False)
    alone = completion(echo=True, logprobs=0, max_tokens=0)
    assert (alone.params.prompt_logprobs, alone.params.max_tokens, alone.is_prompt_only) == (0, 1, True)
    with pytest.raises(BadArgument, match="max_tokens"):
        completion(max_tokens=0)


def test_content_parts_are_joined_and_developers_speak_as_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    assert chat(messages=messages).prompts[0]["messages"] == [
        {"role": "system", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]


def test_tools_go_to_the_template_unless_none_may_be_called() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(tools=tools).prompts[0]["tools"] == tools
    assert "tools" not in chat(tools=tools, tool_choice="none").prompts[0]
    assert "tools" not in chat(tools=[]).prompts[0]


def test_a_session_is_the_bodys_then_the_headers_then_the_users() -> None:
    caller = Caller(session="header")
    assert completion(caller, session_id="body", user="u").session == "body"
    assert completion(caller, user="u").session == "header"
    assert completion(user="u").session == "u"
    assert completion().session is None


def test_a_session_keeps_different_prompts_together_and_other_sessions_apart() -> None:
    def chain(prompt: str, session: str) -> tuple[bytes, ...]:
        return make_prompt(prompt, None, None, model="", cache_salt="", session=session).chain

    one, other, elsewhere = chain("a" * 400, "s"), chain("b" * 400, "s"), chain("a" * 400, "t")
    assert one[:2] == other[:2]
    assert not set(one[2:]) & set(other[2:])
    assert not set(one) & set(elsewhere)
    assert len(chain("a" * 1_000_000, "s")) == MAX_CHAIN_NODES


def test_no_two_keys_share_a_salt_whatever_they_ask_for() -> None:
    other = Caller(key=b"l" * 32)
    salts = {completion(caller, cache_salt=salt).cache_salt for caller in (KEYED, other) for salt in ("", "x", "y")}
    assert len(salts) == 6
    named = completion(KEYED, cache_salt="x").cache_salt
    assert completion(other, cache_salt=named).cache_salt != named
    assert completion(cache_salt="x").cache_salt == "x"
    assert completion().cache_salt is None


def test_several_prompts_are_each_a_request() -> None:
    assert completion(prompt=[1, 2]).prompts == ({"token_ids": [1, 2]},)
    assert completion(prompt=["a", [1]], n=2).num_outputs == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"add_special_tokens": False}, "add_special_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt_embeds": "x"}, "prompt_embeds"),
        ({"guided_json": {}}, "guided_json"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"logit_bias": {"\u0661": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"stream_options": {}}, "stream_options"),
        ({"session_id": "\n"}, "session_id"),
    ],
)
def test_what_is_not_served_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Problem) as caught:
        completion(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"documents": [{"text": "a"}]}, "documents"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ],
)
def test_what_is_not_served_of_chats_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Problem) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_values_that_change_nothing_are_taken() -> None:
    ask = chat(
        response_format={"type": "text"}, tool_choice="auto", modalities=["text"], add_generation_prompt=True,
        store=False, metadata={"a": "b"}, parallel_tool_calls=True, never_heard_of=1, functions=[],
        function_call="none", top_logprobs=0, add_special_tokens=False, use_beam_search=False, bad_words=[],
        kv_transfer_params={}, documents=[], service_tier="auto", reasoning_effort="low", best_of=1,
    )  # fmt: skip
    assert (ask.num_outputs, ask.params.logprobs) == (1, None)
    ask = completion(suffix="", response_format={"type": "text"}, add_special_tokens=True, best_of=1, top_k=-1)
    assert ask.params.top_k == 0


def test_any_text_is_a_user_and_users_stay_apart() -> None:
    odd = ("u" * 300, "v" * 300, "a\nb", "a\nc", "\u6f22" * 100)
    sessions = [completion(user=user).session for user in odd]
    assert len(set(sessions)) == len(odd)
    assert sessions == [completion(user=user).session for user in odd]
    for session in sessions:
        assert session is not None
        assert completion(session_id=session).session == session  # it is a name as others are


def test_a_refusal_of_an_earlier_turn_is_what_the_assistant_said() -> None:
    said = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "no"}]
    messages = [{"role": "assistant", "content": said}, {"role": "user", "content": "b"}]
    assert chat(messages=messages).prompts[0]["messages"][0]["content"] == "ano"


def test_ranges_are_those_of_every_other_way_in() -> None:
    with pytest.raises(BadArgument, match="temperature must be a number from 0 to 100, not -1"):
        completion(temperature=-1)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b'{"prompt": "a", "n": "b"}', "n", "int"),
        (b'{"prompt": "a", "stream_options": {"include_usage": 1}}', "stream_options.include_usage", "bool"),
        (b"{}", None, "prompt"),
        (b"[]", None, "object"),
        (b'{"prompt": NaN}', None, "JSON"),
        (b"\xff", None, "JSON"),
        (b'{"prompt": "\xff"}', None, "JSON"),
        (b"[" * 100_000, None, ""),
    ],
)
def test_a_body_that_does_not_fit_is_refused_at_the_field(body: bytes, param: str | None, words: str) -> None:
    with pytest.raises(Problem) as caught:
        parse(body, CompletionRequest)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message
