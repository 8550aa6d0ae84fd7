"""The gradient check: what is differenced, how probes measure, how measurements are judged, where a fault lies."""
