"""Figures for Prometheus: what gateways measure, and what brokers and workers report, under stable names."""
