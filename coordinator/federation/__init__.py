"""The federation as a pure state machine: requests in, events and commands out.

Nothing in this package reads a clock, a file or the network, or draws a random number; the engine does.
Read state.py, then events.py, then step.py; due.py says what time alone brings about, explain.py says it in words.
"""
