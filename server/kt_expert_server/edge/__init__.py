"""Where the server meets the network: gRPC, HTTP, and the driver that connects them to the core."""
