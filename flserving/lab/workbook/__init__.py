"""The student's workbook: what a notebook asks, stores and shows.

``answers.py`` stores guesses, quizzes and points, ``stack.py`` the parts that were written;
``sources.py`` shows how the package does it, ``sentences.py`` an error as one sentence.
"""
