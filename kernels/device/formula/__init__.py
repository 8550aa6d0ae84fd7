"""The loss formula on sequences' log-probabilities, in one launch."""
