--- Errors that leave a task go to its runtime's `on_error`, which the user may have replaced: what that throws goes no
--- farther, for there is nobody to catch it.

local described = require "moonrabbit.described"

---@param runtime table
---@param text string with its traceback
---@param task table?
return function(runtime, text, task)
  local ok, err = pcall(runtime.on_error, text, task)
  if not ok then
    io.stderr:write("moonrabbit: on_error failed: ", described(err), "\nfor: ", text, "\n")
  end
end
