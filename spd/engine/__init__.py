"""How a step is executed: compiled or not, in one graph or pass by pass, in one process or several."""
