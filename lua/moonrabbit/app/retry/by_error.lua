--- Policies by error: the first rule that fits the failure names the policy.
--
--     retry.by_error {
--       { kind = "timeout", retry.constant { delay = 1, attempts = 3 } },
--       { match = "^deadlock", retry.exponential { first = 0.1 } },          -- a Lua pattern in the message
--       { when = function(err, msg) return err.value.code == 429 end, retry.constant { delay = 60 } },
--       { temporary = false, retry.none() },                                 -- of a moonrabbit.Error
--       otherwise = retry.exponential {},
--     }
--
-- A rule may have several conditions: all must hold. Without `otherwise` a failure that no rule knows is not
-- tried again.
-- @module moonrabbit.app.retry.by_error

local options = require "moonrabbit.options"

local by_error = {}

local ByError = {}
ByError.__index = ByError
ByError.__name = "moonrabbit.RetryByError"

local conditions = {
  kind = options.string,
  match = function(value)
    if type(value) ~= "string" then return "a Lua pattern" end
    if not pcall(string.find, "", value) then return "a Lua pattern (this one is malformed)" end
  end,
  when = options.callback,
  temporary = options.boolean,
}

local function check_rule(retry, i, rule, level)
  local what = ("retry.by_error: rule %d"):format(i)
  if type(rule) ~= "table" then error(what .. " must be a table { kind = …, policy }", level + 1) end
  local named = {}
  for key, value in pairs(rule) do
    if key ~= 1 then named[key] = value end
  end
  options.check(what, named, conditions, level + 1)
  if next(named) == nil then error(what .. " has no condition (kind, match, when, temporary)", level + 1) end
  if not retry.is_policy(rule[1]) then error(what .. " has no policy", level + 1) end
end

--- Makes one; used by retry.by_error.
---@package
function by_error.new(retry, rules, level)
  level = level + 1
  if type(rules) ~= "table" then error("retry.by_error: rules must be a table, not a " .. type(rules), level) end
  for key in pairs(rules) do
    if type(key) ~= "number" and key ~= "otherwise" then
      error(("retry.by_error: unknown field '%s' (valid: otherwise, and a list of rules)"):format(tostring(key)), level)
    end
  end
  for i = 1, (options.places(rules)) do
    if rules[i] == nil then error(("retry.by_error: rule %d is missing (nil)"):format(i), level) end
    check_rule(retry, i, rules[i], level)
  end
  if rules.otherwise ~= nil and not retry.is_policy(rules.otherwise) then
    error("retry.by_error: 'otherwise' must be a policy", level)
  end
  return setmetatable({ rules = rules, otherwise = rules.otherwise or retry.none() }, ByError)
end

local function holds(rule, err, msg)
  if rule.kind and err.kind ~= rule.kind then return false end
  if rule.match and not tostring(err.message):find(rule.match) then return false end
  if rule.temporary ~= nil then
    local value = err.value
    if type(value) ~= "table" or value.temporary ~= rule.temporary then return false end
  end
  return not rule.when or rule.when(err, msg) and true or false
end

--- The policy for a failure.
---@package
function ByError:policy_for(err, msg)
  for _, rule in ipairs(self.rules) do
    if holds(rule, err, msg) then return rule[1] end
  end
  return self.otherwise
end

function ByError:__call(msg, err, attempt)
  if err.permanent then return nil end
  return self:policy_for(err, msg)(msg, err, attempt)
end

local function conditions_text(rule)
  local parts = {}
  if rule.kind then parts[#parts + 1] = "kind " .. rule.kind end
  if rule.match then parts[#parts + 1] = ("message like '%s'"):format(rule.match) end
  if rule.temporary ~= nil then parts[#parts + 1] = rule.temporary and "temporary" or "not temporary" end
  if rule.when then parts[#parts + 1] = "a function of yours" end
  return table.concat(parts, " and ")
end

local function describe(policy)
  if type(policy) == "table" and policy.describe then return policy:describe() end
  return "a function of yours"
end

--- The timetable of what holds when no rule does.
function ByError:timetable(limit)
  local policy = self.otherwise
  return type(policy) == "table" and policy.timetable and policy:timetable(limit) or {}
end

--- Its rules with their policies, as { { text, policy } }, the last one for everything else.
function ByError:cases()
  local list = {}
  for i, rule in ipairs(self.rules) do list[i] = { conditions_text(rule), rule[1] } end
  list[#list + 1] = { "otherwise", self.otherwise }
  return list
end

--- The policy in a line.
function ByError:describe()
  local parts = {}
  for i, case in ipairs(self:cases()) do parts[i] = case[1] .. ": " .. describe(case[2]) end
  return table.concat(parts, "; ")
end

ByError.__tostring = ByError.describe

return by_error
