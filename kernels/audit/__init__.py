"""The KTO loss as an op under audit: points, laws and error analysis. The only kernels room that knows the library."""
