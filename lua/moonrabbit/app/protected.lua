--- Calls a handler so that what it throws comes back as a value, with its traceback, and it may yield.
-- @module moonrabbit.app.protected

local text_of = require "moonrabbit.app.failure".text
local yielding_pcall = require "moonrabbit.protect"

---@class moonrabbit.app.Thrown
---@field value any          what was thrown
---@field traceback string?  PUC Lua 5.1 has only the outer half of it
local Thrown = {}
Thrown.__index = Thrown

local function caught(value)
  return setmetatable({ value = value, traceback = debug.traceback(text_of(value), 2) }, Thrown)
end

local function without_traceback(cancelled, ok, ...)
  if ok then return true, ... end
  local value = ...
  if value == cancelled and cancelled ~= nil then return false, value end
  return false, setmetatable({ value = value }, Thrown)
end

--- A function (fn, a, b) -> true and what fn returned | false, Thrown. `cancelled` is passed on as it is.
---@param cancelled any what the runtime throws in a cancelled task
---@return fun(fn: function, a: any, b: any): boolean, ...
local function protector(cancelled)
  if yielding_pcall ~= pcall then
    return function(fn, a, b) return without_traceback(cancelled, yielding_pcall(fn, a, b)) end
  end
  local function handle(value)
    if value == cancelled and cancelled ~= nil then return value end
    return caught(value)
  end
  return function(fn, a, b) return xpcall(fn, handle, a, b) end
end

return protector
