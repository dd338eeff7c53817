"""CoAP: the message layer, and what a device may do over it."""
