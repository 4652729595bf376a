"""Other engines, each in an environment of its own and behind one contract, so that one driver measures them all."""
