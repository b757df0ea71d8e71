"""Engines elsewhere: HTTP services, vLLM, the student's weights on their way to it, and the proof
that they arrived.
"""
