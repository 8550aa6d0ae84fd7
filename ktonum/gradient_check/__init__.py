"""`ktonum.gradcheck`: compares the gradients of any function with float64 finite differences, for tests and audits.

`differences` differentiates functions of one variable and does not know autograd. `directions` measures along lines
through the inputs. `verdict` decides. `wrong_element` searches for the element that is wrong.
"""
