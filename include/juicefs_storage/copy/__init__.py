"""The copy of a bucket in partitions, and its proof. Pure; knows nothing of the switch."""
