--- Conditions on headers, properties and fields: { name = wanted, … } compiled into one function.
--
-- `wanted` is a value, a predicate (a function of the value; not called where there is none),
-- route.absent or route.present.
-- @module moonrabbit.app.route.match

local match = {}

local Presence = { __name = "moonrabbit.app.route.presence", __tostring = function(self) return self[1] end }

match.absent = setmetatable({ "route.absent" }, Presence)
match.present = setmetatable({ "route.present" }, Presence)

--- A function (value) -> boolean; nil and what was expected where `wanted` is nothing to want.
---@param wanted any
---@return (fun(value: any): boolean)|nil, string?
function match.value(wanted)
  if wanted == match.absent then return function(value) return value == nil end end
  if wanted == match.present then return function(value) return value ~= nil end end
  if type(wanted) == "function" then
    return function(value)
      return value ~= nil and wanted(value) and true or false
    end
  end
  if type(wanted) == "table" or wanted == nil then
    return nil, "a value, a predicate function, route.absent or route.present"
  end
  return function(value) return value == wanted end
end

--- Compiles { name = wanted }; nil, the name and what was expected where it cannot.
---@param spec table<string, any>
---@param any boolean one is enough
---@return (fun(values: table): boolean)|nil, string?, string?
function match.compile(spec, any)
  local names, tests = {}, {}
  for name in pairs(spec) do names[#names + 1] = name end
  table.sort(names)
  for i, name in ipairs(names) do
    local problem
    tests[i], problem = match.value(spec[name])
    if not tests[i] then return nil, name, problem end
  end
  local count, first_name, first_test = #names, names[1], tests[1]
  if count == 1 then return function(values) return first_test(values[first_name]) end end
  return function(values)
    for i = 1, count do
      if tests[i](values[names[i]]) == any then return any end
    end
    return not any
  end
end

return match
