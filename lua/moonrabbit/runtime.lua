--- Finds a runtime by name. The interface is described in docs/internals.md.
-- @module moonrabbit.runtime

local runtime = {}

local required = { "now", "sleep", "spawn", "condition", "open" }

--- A runtime by its name ("native", "resty", ...), or a table that is one.
---@param which string|table|nil nil: "native"
---@param level integer?
---@return table
function runtime.find(which, level)
  level = (level or 2) + 1
  which = which or "native"
  if type(which) == "table" then
    for _, name in ipairs(required) do
      if type(which[name]) ~= "function" then
        error("option 'runtime': the table lacks the function '" .. name .. "'", level)
      end
    end
    return which
  end
  if type(which) ~= "string" or not which:find "^[%a_][%w_]*$" then
    error("option 'runtime' must be the name of a runtime or a table, not a " .. type(which), level)
  end
  if which == "native" and rawget(_G, "ngx") and rawget(_G, "ngx").get_phase then
    error("a native connection would block nginx: use require \"moonrabbit.resty\" there", level)
  end
  local name = "moonrabbit.runtime." .. which
  local ok, found = pcall(require, name)
  if not ok and not tostring(found):find("module '" .. name .. "' not found", 1, true) then error(found, level) end
  if not ok or type(found) ~= "table" or not found.open then
    error("option 'runtime': there is no runtime '" .. which .. "'", level)
  end
  return found
end

return runtime
