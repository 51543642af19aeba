"""Full-catalogue evaluation: exact ranks, metrics, evaluator, tables of results."""
