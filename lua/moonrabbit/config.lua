--- Configuration by environment: a table for each, and one that all share.
--
--     local config = mr.config {
--       default = { url = "amqp://localhost/", concurrency = 4 },
--       production = {
--         url = "amqps://orders@rabbit.example/",
--         password = mr.secret.file "/run/secrets/rabbitmq",
--         concurrency = mr.config.env("CONCURRENCY", 32),
--       },
--     }
--     return mr.app { connect = { uri = config.url, password = config.password }, … }
--
-- `moonrabbit run --env production` chooses; else the variable MOONRABBIT_ENV does; else it is `default`. What the chosen
-- one says goes over `default`, tables within tables too; lists are replaced. An environment may be a function that returns its
-- table: it is called when it is chosen.
--
-- Values that are not set, files that cannot be read and environments that there are not throw, with their names. A
-- field that no environment has throws when it is read, with the name that was meant (where all of them are tables).
--
-- `mr.config(environments, name)` takes that one, whatever was chosen.
-- @module moonrabbit.config

local options = require "moonrabbit.options"
local secret = require "moonrabbit.secret"

local config = {}

-- What was chosen, and what the scripts that were loaded since have asked for.
local state = { chosen = nil, used = false, secrets = {} }

local DEEPEST = 20

-- ---- Values from elsewhere --------------------------------------------------------------------------

local Source = {}

local function source(read, default) return setmetatable({ read = read, default = default }, Source) end

local words = { ["true"] = true, ["1"] = true, ["false"] = false, ["0"] = false }

-- A text as the type that the default has.
local function converted(text, default)
  if type(default) == "number" then
    local n = tonumber(text)
    if not n then return nil, "is no number" end
    return n
  end
  if type(default) == "boolean" then
    if words[text] == nil then return nil, "is neither true nor false" end
    return words[text]
  end
  return text
end

local function check_default(what, name, default)
  if type(name) ~= "string" or name == "" then error(what .. ": a name expected, not a " .. type(name), 3) end
  local kind = type(default)
  if kind ~= "nil" and kind ~= "string" and kind ~= "number" and kind ~= "boolean" then
    error(what .. ": the default must be a string, a number or a boolean, not a " .. kind, 3)
  end
end

--- In a table of mr.config: the value of an environment variable, as a number or boolean where the default is one.
--- For secrets use mr.secret.env.
---@param name string
---@param default (string|number|boolean)? when it is not set; without one it must be
---@return table
function config.env(name, default)
  check_default("config.env", name, default)
  return source(function()
    local text = os.getenv(name)
    if default ~= nil and (text == nil or text == "") then return default end
    local value, why = secret.read_env(name)
    if value == nil then return nil, why end
    value, why = converted(value, default)
    if value == nil then return nil, ("the environment variable %s %s"):format(name, why) end
    return value
  end)
end

--- In a table of mr.config: what a file holds, without the line's end at its end. For secrets use mr.secret.file.
---@param path string
---@return table
function config.file(path)
  check_default("config.file", path)
  return source(function() return secret.read_file(path) end)
end

-- ---- Putting together -------------------------------------------------------------------------------

local Problem = {}

-- Ends it; caught in mr.config.
local function bad(...) error(setmetatable({ (...):format(select(2, ...)) }, Problem), 0) end

local function is_map(value)
  return type(value) == "table" and getmetatable(value) == nil and value[1] == nil
end

local function merged(base, over, depth)
  if depth > DEEPEST then bad("tables within tables, more than %d deep", DEEPEST) end
  if not (is_map(base) and is_map(over)) then return over end
  local all = {}
  for key, value in pairs(base) do all[key] = value end
  for key, value in pairs(over) do
    if all[key] ~= nil then value = merged(all[key], value, depth + 1) end
    all[key] = value
  end
  return all
end

local function resolved(value, path, depth)
  if depth > DEEPEST then bad("%s: tables within tables, more than %d deep", path, DEEPEST) end
  if secret.is(value) then
    state.secrets[#state.secrets + 1] = { path = path, ask = value }
  elseif getmetatable(value) == Source then
    local found, why = value.read()
    if found == nil then bad("%s: %s", path, why) end
    return found
  elseif type(value) == "table" and getmetatable(value) == nil then
    local all = {}
    for key, each in pairs(value) do
      all[key] = resolved(each, path == "" and tostring(key) or path .. "." .. tostring(key), depth + 1)
    end
    return all
  end
  return value
end

local function names_of(environments)
  local list = {}
  for name in pairs(environments) do list[#list + 1] = tostring(name) end
  table.sort(list)
  return table.concat(list, ", ")
end

local function table_of(environments, name)
  local values = environments[name]
  if type(values) == "function" then values = values() end
  if type(values) ~= "table" then bad("the environment '%s' is a %s, and no table", name, type(values)) end
  return values
end

local function choose(environments, name)
  local default = environments.default ~= nil and table_of(environments, "default") or {}
  if name == nil or name == "default" then
    if environments.default ~= nil then return default end
    bad("no environment is chosen (--env, or MOONRABBIT_ENV), and there is no 'default'; there are: %s",
      names_of(environments))
  end
  if environments[name] == nil then
    local hint = options.nearest(name, environments)
    bad("there is no environment '%s'%s; there are: %s", name, hint and " (did you mean '" .. hint .. "'?)" or "",
      names_of(environments))
  end
  return merged(default, table_of(environments, name), 0)
end

-- Every field that some environment has; a function that was not called may have any.
local function known_fields(environments, chosen)
  local known = {}
  for key in pairs(chosen) do known[key] = true end
  for _, values in pairs(environments) do
    if type(values) == "function" then return nil end
    for key in pairs(values) do known[key] = true end
  end
  return known
end

local function strict(values, known, name)
  return setmetatable(values, {
    __index = known and function(_, key)
      if known[key] then return nil end
      local hint = type(key) == "string" and options.nearest(key, known)
      error(("config: no environment has a field '%s'%s"):format(tostring(key),
        hint and " (did you mean '" .. hint .. "'?)" or ""), 2)
    end,
    __tostring = function() return ("moonrabbit.config (%s)"):format(name) end,
  })
end

local function check(environments)
  if type(environments) ~= "table" then bad("a table of environments expected, not a %s", type(environments)) end
  if next(environments) == nil then bad("there are no environments: mr.config { default = { … } }") end
  for name, values in pairs(environments) do
    if type(name) ~= "string" then bad("environments have names: mr.config { default = { … } }") end
    if type(values) ~= "table" and type(values) ~= "function" then
      bad("the environment '%s' is a %s, and no table", name, type(values))
    end
  end
end

local function chosen_name(given)
  if given ~= nil then return given end
  if state.chosen ~= nil then return state.chosen end
  local name = os.getenv "MOONRABBIT_ENV"
  return name ~= "" and name or nil
end

local function build(environments, given)
  check(environments)
  local name = chosen_name(given)
  state.used = true
  local values = resolved(choose(environments, name), "", 0)
  return strict(values, known_fields(environments, values), name or "default")
end

-- mr.config itself: the values of the environment that is chosen. `name`: of this one, whatever was chosen.
local function of(_, environments, name)
  if name ~= nil then options.argument("mr.config", "name", name, options.string) end
  local ok, result = pcall(build, environments, name)
  if ok then return result end
  if getmetatable(result) ~= Problem then error(result, 0) end
  error("mr.config: " .. result[1], 2)
end

-- ---- For who loads scripts --------------------------------------------------------------------------

--- Chooses for the scripts that are loaded from now on. nil: what MOONRABBIT_ENV says.
---@param name string?
function config.choose(name) state.chosen, state.used, state.secrets = name, false, {} end

--- Whether a script has asked for its configuration since.
---@package
---@return boolean
function config.used() return state.used end

--- The secrets in what they were given: { path, ask }.
---@package
---@return table[]
function config.secrets() return state.secrets end

return setmetatable(config, { __call = of })
