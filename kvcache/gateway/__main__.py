import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load Ctrl-C is an end without a traceback

from kvcache.gateway.main import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
