--- Mistakes in what `mr.app` was given: where a check ends.
-- @module moonrabbit.app.plan.mistake

local options = require "moonrabbit.options"

local mistake = {}

local Mistake = {}

--- Ends the check; mistake.caught has its text.
---@param text string  and what goes into it, as string.format takes it
function mistake.bad(text, ...) error(setmetatable({ text:format(...) }, Mistake), 0) end

--- Checks a table of options.
---@param what string
---@param given any
---@param schema table
function mistake.check(what, given, schema)
  if type(given) ~= "table" then mistake.bad("%s must be a table, not a %s", what, type(given)) end
  local ok, problem = pcall(options.check, what, given, schema, -1)
  if not ok then mistake.bad("%s", problem) end
end

--- fn(...)'s result; nil and its mistake. What else it throws goes on.
---@return any, string? problem
function mistake.caught(fn, ...)
  local ok, result = pcall(fn, ...)
  if ok then return result end
  if getmetatable(result) == Mistake then return nil, result[1] end
  error(result, 0)
end

return mistake
