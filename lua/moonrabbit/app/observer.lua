--- Observers are called in the middle of things, and are somebody else's code: what one throws goes into the log, once
-- for each of its functions, and no further. A message would else keep its place among the `concurrency` for ever.
-- @module moonrabbit.app.observer

local text_of = require "moonrabbit.app.failure".text

local observer = {}

local function default_log(_, text) io.stderr:write("moonrabbit: ", text, "\n") end

local function guarded(name, fn, log)
  local said = false
  return function(...)
    local ok, err = pcall(fn, ...)
    if ok or said then return end
    said = true
    log("error", ("the observer's function '%s' threw (said once): %s"):format(name, text_of(err)))
  end
end

--- An observer that throws nothing. One that says so of itself (`guarded`) stays as it is.
---@param given table
---@param log fun(level: string, text: string)? stderr by default
---@return table
function observer.guard(given, log)
  if given.guarded then return given end
  local made = { guarded = true }
  for name, value in pairs(given) do
    made[name] = type(value) == "function" and guarded(name, value, log or default_log) or value
  end
  return made
end

return observer
