"""An audit, from the settings to the verdicts: in this process, or in a pytest session spread over workers and GPUs.

- `judge` makes a verdict of a check on a case. `in_process` is `ktonum.audit`.
- `settings` says what was asked for, `op_loading` finds the ops, and `plan` lists the items.
- `pytest_session` runs planned items in a pytest session of its own. `session_hooks` is the part that this session and
  ``pytest --ktonum`` share; `pytest_items` and `item_runner` turn an item into a test and run it.
- `audit_process` sets up each process, with `devices` and `gpu_slots`. `worker_crashes` is for workers that die.
"""
