"""What a training costs, and what more of it would bring: accounting of operations, fits of power laws."""
