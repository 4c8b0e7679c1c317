"""Parameters on the server as the trainer sees them: tensors with a shape, a dtype and a device, and no storage here."""
