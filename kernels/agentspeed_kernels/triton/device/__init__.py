"""Code that runs on the device: functions of Triton and Gluon, checked by compilation and by numbers, not by types."""
