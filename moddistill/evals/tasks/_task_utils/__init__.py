"""Modules that several tasks share, as in `lmms_eval/tasks/_task_utils`."""
