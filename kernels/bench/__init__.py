"""`ktonum bench`: time, memory and error of KTO losses beside the matrix products that none can do without."""
