"""The kt-expert server: owns expert weights and LoRA buffers, serves forward, backward and optimizer steps."""
