"""Implementations to put to an audit: right ones, and copies of them with one planted defect each.

The benchmarks count which of them a judge flags. The tests demand that a check flag the wrong ones and pass the right.
"""
