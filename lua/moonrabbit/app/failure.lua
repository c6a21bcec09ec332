--- What a handler's run came to: success, an outcome that it asked for, or a failure that says why.
--
-- A failure is what retry policies are given as `err`:
--
-- | field | |
-- | --- | --- |
-- | `kind` | "error": thrown or returned after nil; "permanent"; "timeout"; "nonsense": the handler returned what means nothing; "asked": outcome.retry |
-- | `message` | one line for people |
-- | `permanent` | whether trying again cannot help |
-- | `traceback` | of what was thrown |
-- | `value` | what was thrown or returned |
-- | `attempt` | the attempt that failed, from 1; the runner sets it |
-- | `since` | seconds since the message failed first in this process; the runner sets it |
-- @module moonrabbit.app.failure

local outcome = require "moonrabbit.app.outcome"

local getmetatable, tostring, type = getmetatable, tostring, type
local Outcome, Permanent = outcome.Outcome, outcome.Permanent

---@class moonrabbit.Failure
---@field kind "error"|"permanent"|"timeout"|"nonsense"|"asked"
---@field message string
---@field permanent boolean
---@field traceback string?
---@field value any
---@field attempt integer?
local Failure = {}
Failure.__index = Failure
Failure.__name = "moonrabbit.Failure"

function Failure.__tostring(self) return self.message end

local failure = { Failure = Failure }

--- Makes one.
---@return moonrabbit.Failure
function failure.new(kind, message, fields)
  local self = fields or {}
  self.kind, self.message = kind, message
  self.permanent = self.permanent or kind == "permanent"
  return setmetatable(self, Failure)
end

local new = failure.new

local MEANING = "nothing or true means success, nil and an error a failure"

local function describe(value)
  if type(value) == "string" then return "the string '" .. value:sub(1, 60) .. "'" end
  if type(value) == "number" or type(value) == "boolean" then return tostring(value) end
  return "a " .. type(value)
end

--- Anything as text, also what throws when it is asked for.
---@param value any
---@return string
function failure.text(value)
  if type(value) == "string" then return value end
  local ok, text = pcall(tostring, value)
  if ok and type(text) == "string" then return text end
  return "(a " .. type(value) .. " whose __tostring fails)"
end

local function field_message(value) return value.message end

local function message_of(value)
  if type(value) == "string" then return value end
  local meta = getmetatable(value)
  if type(meta) == "table" and meta.__tostring then return failure.text(value) end
  local ok, message = pcall(field_message, value)
  if type(value) == "table" and ok and type(message) == "string" then return message end
  return "(an error that is " .. describe(value) .. ")"
end

local function from_error(value, traceback)
  if getmetatable(value) == Permanent then
    return new("permanent", value.message, { value = value.value, traceback = traceback })
  end
  return new("error", message_of(value), { value = value, traceback = traceback })
end

--- The failure of a handler that threw; or the outcome that it threw.
---@param thrown moonrabbit.app.Thrown
---@return moonrabbit.Failure|nil, moonrabbit.Outcome|nil
function failure.of_thrown(thrown)
  -- Lua's own words where there was no room left to look at what was thrown.
  if type(thrown) ~= "table" then thrown = { value = thrown } end
  local value = thrown.value
  if getmetatable(value) == Outcome then return nil, value end
  if getmetatable(value) == Failure then
    value.traceback = value.traceback or thrown.traceback
    return value
  end
  return from_error(value, thrown.traceback)
end

--- What a handler's results mean: nil (success), a failure, or nil and the outcome it asked for.
---@param n integer how many there are
---@param value any the first
---@param reason any the second
---@return moonrabbit.Failure|nil, moonrabbit.Outcome|nil
function failure.of_results(n, value, reason)
  if n == 0 or value == true then return nil end
  local kind = getmetatable(value)
  if kind == Outcome then return nil, value end
  if kind == Permanent then return from_error(value) end
  if value ~= nil then
    return new("nonsense", "the handler returned " .. describe(value) .. ": " .. MEANING, { value = value })
  end
  if n == 1 then
    return new("nonsense", "the handler returned a lone nil (a misspelt name gives one too): " .. MEANING)
  end
  if reason == nil then return new("error", "the handler returned nil and no error") end
  if getmetatable(reason) == Outcome then return nil, reason end
  if getmetatable(reason) == Failure then return reason end
  return from_error(reason)
end

--- The failure of a handler that has not returned in time.
---@param seconds number
---@return moonrabbit.Failure
function failure.timeout(seconds)
  return new("timeout", ("the handler has not returned within %g s"):format(seconds))
end

return failure
