"""MQTT 3.1.1 and 5.0: the wire, topics, and the machines of a connection and a session. No I/O here and no clock."""
