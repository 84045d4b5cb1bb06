"""The processes of a training job: launched, supervised, and how their failures are reported."""
