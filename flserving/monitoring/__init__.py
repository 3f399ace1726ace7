"""Files for those who operate a server: Prometheus rules, alerts and configuration, a Grafana dashboard. No code."""
