"""SGLang on a CPU without kernels of its own: a platform, and the operators its models call."""
