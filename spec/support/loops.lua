--- Runs a function as a task of a runtime, and the loop that it belongs to, until it is done: what the
--- specs and benchmarks of runtimes share.

local loops = {}

--- Debian has Copas and what it needs for some versions of Lua only; it is the same for all. MOONRABBIT_COPAS is a
--- folder with another one, which comes first: Copas 4 has another way of waiting than Debian's.
function loops.find_copas()
  local own, path = os.getenv "MOONRABBIT_COPAS", package.path
  if own and not path:find(own, 1, true) then path = ("%s/?.lua;%s/?/init.lua;"):format(own, own) .. path end
  package.path = path .. ";/usr/share/lua/5.1/?.lua"
end

local drive = {}

function drive.native(fn) require("moonrabbit.runtime.native").run(fn) end

function drive.cqueues(fn)
  local cq = require("cqueues").new()
  cq:wrap(fn)
  assert(cq:loop())
end

function drive.copas(fn)
  local copas = require "copas"
  local done = false
  copas.addthread(function()
    fn()
    done = true
  end)
  while not done do copas.step() end
end

function drive.luv(fn)
  local uv = require "luv"
  require("moonrabbit.runtime.luv").spawn(fn)
  uv.run()
end

--- Whether the runtime's library is there. It is not loaded: busted forgets modules between files, and luv dies
--- when it is loaded a second time into one Lua.
function loops.has(name)
  if name == "native" then return true end
  if name == "copas" then loops.find_copas() end
  for _, search in ipairs(package.searchers or package.loaders) do -- luacheck: ignore 143
    if type(search(name)) == "function" then return true end
  end
  return false
end

--- Copas 3 and later turns for its own timeouts, whatever there is to do.
function loops.copas_ticks()
  return loops.has "copas" and require("copas").timeout ~= nil
end

--- Runs fn(runtime); what it throws is thrown here.
function loops.run(name, fn)
  if name == "copas" then loops.find_copas() end
  local runtime = require("moonrabbit.runtime").find(name)
  local ok, err
  drive[name](function() ok, err = require "moonrabbit.protect"(fn, runtime) end)
  if ok == nil then error("the loop ended before what ran in it", 0) end
  if not ok then error(err, 0) end
end

return loops
