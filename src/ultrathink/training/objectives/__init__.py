"""What is learned, a file for each way of learning."""
