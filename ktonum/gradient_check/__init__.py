"""`ktonum.gradcheck`: gradients of any function against float64 finite differences, for tests and for audits.

`differences` differentiates functions of one variable and knows no autograd, `directions` measures along lines through
the inputs, `verdict` judges, `wrong_element` searches for the element that is wrong.
"""
