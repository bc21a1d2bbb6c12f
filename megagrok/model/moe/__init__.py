"""Grok's mixture of experts on DeepSpeed's expert groups: router, dispatch, experts, and the layer that joins them."""
