"""The folder that kt_expert_client.launch puts on PYTHONPATH: Python imports its sitecustomize in every process it starts."""
