"""`find_scaling`: a task and a model in, a judged scaling out."""
