--- What the programs that measure peers share: running commands, peers and the real broker's queues.
--
-- A peer is { name, command, there }: a program that prints one line of JSON (bench/README.md), and a command that tells
-- whether it can run here.
local harness = {}

local here = arg[0]:match "^(.*)/[^/]*$" or "."
local top = here .. "/.."
harness.top, harness.here = top, here
harness.build = os.getenv "BUILD" or (top .. "/build")
harness.bin = top .. "/build/bench"

function harness.say(...) io.stderr:write("bench: ", string.format(...), "\n") end

function harness.quote(s) return "'" .. s:gsub("'", "'\\''") .. "'" end
local quote = harness.quote

local function output(command)
  local pipe = assert(io.popen(command))
  local text = pipe:read "a"
  return pipe:close() and text or nil, text
end

function harness.works(command) return (os.execute(command .. " > /dev/null 2>&1")) == true end

function harness.exists(path)
  local f = io.open(path)
  if f then f:close() end
  return f ~= nil
end

function harness.median(values)
  table.sort(values)
  local n = #values
  return n % 2 == 1 and values[(n + 1) // 2] or (values[n // 2] + values[n // 2 + 1]) / 2
end

--- Without a broker in AMQP_URL this program again, with one of its own, which ends it; returns where that cannot be.
function harness.with_broker()
  if (os.getenv "AMQP_URL" or "") ~= "" then return end
  local with_broker = top .. "/scripts/with-broker"
  if not harness.exists(with_broker) then return end
  local words = { quote(with_broker), "single", "--", quote(arg[0]) }
  for _, a in ipairs(arg) do words[#words + 1] = quote(a) end
  local _, _, code = os.execute(table.concat(words, " "))
  os.exit(code)
end

-- ---- Peers --------------------------------------------------------------------------------------

local function lua_env(version)
  return ("LUA_PATH=%s LUA_CPATH=%s"):format(quote(("%s/lua/?.lua;%s/lua/?/init.lua;;"):format(top, top)),
    quote(("%s/%s/?.so;;"):format(harness.build, version)))
end

--- A script of bench/peers under a Lua.
function harness.lua_peer(name, interpreter, version, script)
  local run = ("env %s %s"):format(lua_env(version), interpreter)
  return { name = name, command = run .. " " .. quote(here .. "/peers/" .. script),
           there = run .. [[ -e 'require "moonrabbit"']] }
end

harness.python = os.getenv "PYTHON" or "/usr/bin/python3"
harness.node = ("env NODE_PATH=%s node"):format(quote(harness.bin .. "/node_modules"))

--- Those of a list that can run here; the others are named. wanted: "a,b", or nil for all.
function harness.present(peers, wanted)
  local list = {}
  wanted = wanted and "," .. wanted .. ","
  for _, peer in ipairs(peers) do
    if wanted and not wanted:find("," .. peer.name .. ",", 1, true) then -- luacheck: ignore 542
      -- not asked for
    elseif harness.works(peer.there) then
      list[#list + 1] = peer
    else
      harness.say("%s is not there: left out", peer.name)
    end
  end
  return list
end

--- One run of a peer: its figures, or nil and what it said. what: { mode, url, queue, size, count, window, prefix }
function harness.run_peer(peer, what)
  local said = harness.bin .. "/peer.err"
  local command = ("BENCH_QUEUE=%s timeout -k 5 120 %s %s %s %s %d %d %d 2> %s"):format(
    quote(what.queue or ""), what.prefix or "", peer.command, what.mode, quote(what.url), what.size, what.count,
    what.window, quote(said))
  local text = output(command)
  local figures = {}
  for key, value in (text or ""):gmatch '"([%a_]+)"%s*:%s*([%d.eE+-]+)' do figures[key] = tonumber(value) end
  if not (figures.messages and figures.seconds and figures.cpu_us and figures.rss_kb) then
    local f = io.open(said)
    local why = f and f:read "a" or ""
    if f then f:close() end
    return nil, why:match "[^\n]+" or "no figures"
  end
  figures.rate = figures.messages / figures.seconds
  return figures
end

--- Adds a run's figures to an entry's lists, by their names.
function harness.note(entry, figures)
  for key, list in pairs(entry) do
    if type(list) == "table" and figures[key] then list[#list + 1] = figures[key] end
  end
end

--- The quickest run less the slowest, as a part of the median.
function harness.spread(rates)
  return (math.max(table.unpack(rates)) - math.min(table.unpack(rates))) / harness.median(rates)
end

-- ---- The real broker's queues -------------------------------------------------------------------

--- Declares, purges or deletes a durable queue.
function harness.queue(what, url, name)
  if not harness.works(table.concat({ quote(harness.bin .. "/queue"), what, quote(url), quote(name) }, " ")) then
    error(("cannot %s the queue %s"):format(what, name), 0)
  end
end

return harness
