"""What has no place in a training set: personal data, and the texts that models are evaluated on."""
