"""An audit, from the plan to the verdicts: in this process, or in a pytest session spread over workers and GPUs.

`judge` makes a verdict of a check on a case, `in_process` is `ktonum.audit`; `plan`, `pytest_items`, `worker_process`,
`gpu_slots` and `pytest_session` are what the command line and the pytest plugin share.
"""
