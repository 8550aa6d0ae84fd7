"""One case made ready for its checks: inputs, oracle, candidate run and bounds, each computed once.

Also what must not be mistaken for a wrong candidate: an exhausted device, and Triton's interpreter where it is wrong.
"""
