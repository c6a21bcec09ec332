--- The option `retry` of a publisher: what is sent again, when, and for how long.
-- @module moonrabbit.publisher.policy

local options = require "moonrabbit.options"

local huge = math.huge

---@class moonrabbit.PublisherRetry
---@field first number?      seconds before a refused message goes again for the first time; 0.1 by default
---@field factor number?     each pause is so many times the one before; 2 by default
---@field max number?        seconds, the longest pause; 30 by default
---@field jitter number?     each pause is shorter or longer by up to this part of it; 0.2 by default
---@field attempts number?   how often a message that the broker refused or returned goes again; 10 by default, 0: never, math.huge: for ever
---@field on_nack boolean?   a message that the broker refused (basic.nack) goes again; true by default
---@field on_return boolean? a message that no queue took goes again; false by default
---@field deadline number?   seconds from the first loss, refusal or outage after which a message is given up; math.huge by default

---@class moonrabbit.publisher.Policy : moonrabbit.PublisherRetry
local Policy = {}
Policy.__index = Policy

local schema = {
  first = options.seconds, max = options.seconds, deadline = options.seconds,
  factor = options.number(1),
  attempts = options.either(options.integer(0, 9007199254740991), function(value)
    if value ~= huge then return "math.huge" end
  end),
  on_nack = options.boolean, on_return = options.boolean,
  jitter = function(value)
    if type(value) ~= "number" or not (value >= 0 and value <= 1) then return "a number from 0 to 1" end
  end,
}
local defaults = {
  first = 0.1, factor = 2, max = 30, jitter = 0.2, attempts = 10, on_nack = true, on_return = false, deadline = huge,
}

--- For the schema of a publisher's options.
function Policy.kind(value)
  if type(value) ~= "boolean" and type(value) ~= "table" then return "a boolean or a table" end
end

--- The policy of an option's value; nil for `false`.
---@param value boolean|moonrabbit.PublisherRetry|nil
---@param what string    the function, for errors
---@param level integer
---@return moonrabbit.publisher.Policy?
function Policy.new(value, what, level)
  if value == false then return nil end
  local self = {}
  for key, default in pairs(defaults) do self[key] = default end
  if type(value) == "table" then
    options.check(what .. ": retry", value, schema, level + 1)
    for key, given in pairs(value) do self[key] = given end
  end
  return setmetatable(self, Policy)
end

--- Seconds until a message goes again; nil: it does not.
---@param outcome "nacked"|"unroutable"
---@param attempts integer how often it has been refused so far, this time included
---@param random number from 0 to 1
---@return number?
function Policy:delay(outcome, attempts, random)
  local wanted = self.on_nack
  if outcome == "unroutable" then wanted = self.on_return end
  if not wanted or attempts > self.attempts then return nil end
  local pause = math.min(self.max, self.first * self.factor ^ (attempts - 1))
  return pause * (1 + self.jitter * (2 * random - 1))
end

return Policy
