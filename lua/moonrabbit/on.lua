--- moonrabbit in an event loop of its user's choice: `moonrabbit.on "cqueues"`.
--
--     local moonrabbit = require("moonrabbit").on "cqueues"
--     local cqueues = require "cqueues"
--     local cq = cqueues.new()
--     cq:wrap(function()
--       local conn = assert(moonrabbit.connect "amqp://guest:guest@localhost/")
--       conn:close()
--     end)
--     assert(cq:loop())
--
-- The functions are those of the module moonrabbit, in that loop. docs/runtimes.md says what each
-- loop needs, and from where it may be called.
-- @module moonrabbit.on

local runtimes = require "moonrabbit.runtime"

---@class moonrabbit.On
---@field name string        of the runtime
---@field null userdata      as moonrabbit.null
---@field types table        as moonrabbit.types
---@field errors table       the module moonrabbit.errors
---@field uri table          the module moonrabbit.uri
local On = {}

-- Options with the runtime in them; a URI stands for options. What is neither stays: what it is for complains.
local function with_runtime(given, what, runtime)
  if given == nil or type(given) == "string" then return { uri = given, runtime = runtime } end
  if type(given) ~= "table" then return given end
  if given.runtime ~= nil then
    error(("%s: unknown option 'runtime' (this is the runtime '%s')"):format(what, runtime.name), 3)
  end
  local all = { runtime = runtime }
  for key, value in pairs(given) do all[key] = value end
  return all
end

local function functions(runtime)
  local on = {
    name = runtime.name, spawn = runtime.spawn, sleep = runtime.sleep, run = runtime.run,
    pcall = require "moonrabbit.protect",
  }

  function on.connect(options)
    if options == nil then error("connect: a URI or a table of options expected, not a nil", 2) end
    local connection, err = require("moonrabbit.connection").connect(with_runtime(options, "connect", runtime), 2)
    return connection, err
  end

  function on.pool(options)
    local all = options
    if type(options) == "string" then
      all = { connect = with_runtime(options, "pool", runtime) }
    elseif type(options) == "table" then
      all = {}
      for key, value in pairs(options) do all[key] = value end
      all.connect = with_runtime(options.connect, "pool: connect", runtime)
    end
    local pool = require("moonrabbit.pool").new(all, 2)
    return pool
  end

  return on
end

local cache = setmetatable({}, { __mode = "k" }) -- runtime -> functions

--- The functions of a runtime; used by moonrabbit.on.
---@package
---@param which string|table
---@param level integer?
---@return moonrabbit.On
function On.on(which, level)
  local runtime = runtimes.find(which, (level or 1) + 1)
  if not cache[runtime] then
    cache[runtime] = setmetatable(functions(runtime), { __index = function(_, name)
      if name == "null" or name == "types" or name == "errors" or name == "uri" then
        return require("moonrabbit")[name]
      end
    end })
  end
  return cache[runtime]
end

return On
