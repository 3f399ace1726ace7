"""The doors to a server for other processes: REST and gRPC by the Open Inference Protocol V2, and what serves them."""
