"""Protocol of kt-expert: the frame layout of the session stream and the generated control messages."""
