"""Who serves a request: keys from requests, and policies that choose. Pure; the broker is one caller."""
