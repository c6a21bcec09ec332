--- What `make demo` shows: a shop of three apps on a real broker, and everything that can happen to it. At the end each
-- order is looked for in the books and in the mailbox; when one is lost, or a part of the story did not happen, it ends
-- with 1.
--
--   lua examples/shop/director/main.lua [--quick]
--
-- AMQP_URL names the broker. Everything in it gets a name of its own, and is taken away at the end. The broker is
-- restarted only where MOONRABBIT_BROKER says that scripts/with-broker has started it. MOONRABBIT_DEMO_SECONDS (150)
-- bounds it all; with KEEP=1 the folder with logs, books and mailbox stays.
local source = (arg[0]:match "^(.*)/director/[^/]*$") or ".."
package.path = source .. "/?.lua;" .. package.path

local function missing(what, package, rock)
  io.stderr:write(("demo: %s is not installed for %s: run \"make deps\" (Debian: %s), or luarocks install %s\n"):format(
    what, rawget(_G, "jit") and "LuaJIT" or _VERSION, package, rock))
  os.exit(1)
end

if not pcall(require, "luasql.sqlite3") then missing("LuaSQL for SQLite", "lua-sql-sqlite3", "luasql-sqlite3") end
if not pcall(require, "cjson.safe") then missing("lua-cjson", "lua-cjson", "lua-cjson") end
if not pcall(require, "argparse") then missing("argparse", "lua-argparse", "argparse") end

local mr = require "moonrabbit"
local native = require "moonrabbit.runtime.native"
local net = require "moonrabbit.net"
local protect = require "moonrabbit.protect"

local children = require "director.children"
local count = require "director.count"
local panel = require "director.panel"
local queues = require "director.queues"
local screen = require "director.screen"
local story = require "director.story"
local watch = require "director.watch"

local now, paint, say = native.now, screen.paint, screen.say

local quick = arg[1] == "--quick"
if arg[1] and not quick then
  io.stderr:write("usage: lua examples/shop/director/main.lua [--quick]\n")
  os.exit(2)
end

local url = os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"
local broker = os.getenv "MOONRABBIT_BROKER" -- ours to restart

local function complain(...) io.stderr:write("demo: ", string.format(...), "\n") end

-- ---- Before and after -------------------------------------------------------------------------------

local function make_folder()
  local path = os.tmpname()
  os.remove(path)
  local status = os.execute("umask 077 && mkdir -p " .. children.quote(path))
  if status ~= true and status ~= 0 then
    complain("the folder %s cannot be made", path)
    os.exit(1)
  end
  return path
end

-- The scripts are run from a folder of their own, for one of them is changed in the middle.
local function copy_scripts(folder)
  for _, name in ipairs { "orders", "payments", "mail", "order", "books", "journal", "shop" } do
    local file = assert(io.open(("%s/%s.lua"):format(folder, name), "wb"))
    file:write(children.slurp(("%s/%s.lua"):format(source, name)))
    file:close()
  end
end

local function connect(role, log)
  local conn, err = mr.connect {
    uri = url, name = "moonrabbit demo, " .. role, connect_timeout = 10, timeout = 20, log = log,
    reconnect = { max = 1 },
  }
  if conn then return conn end
  complain("%s", tostring(err))
  if err.kind == "refused" or err.kind == "dns" then
    complain("is a broker there? Without AMQP_URL \"make demo\" starts one of its own")
  end
  return nil
end

-- ---- The sum ----------------------------------------------------------------------------------------

local function read_books(folder)
  local books = {}
  local environment = require("luasql.sqlite3").sqlite3()
  local connection = environment:connect(folder .. "/books.db", 5000)
  local cursor = connection and connection:execute "SELECT id, COUNT(*) FROM payments GROUP BY id"
  local id, times
  if cursor then id, times = cursor:fetch() end
  while id do
    books[id] = tonumber(times)
    id, times = cursor:fetch()
  end
  if cursor then cursor:close() end
  if connection then connection:close() end
  environment:close()
  return books
end

local function gather(s)
  s.watch:look()
  local parked = {}
  for _, app in ipairs(watch.apps) do parked[app] = queues.parked(s.control, s.name, app) end
  local website = s.website or { placed = {}, published = 0, confirmed = 0, failures = {} }
  local warm_up = s.warm_up or { published = 0, confirmed = 0, delivered = 0 }
  return {
    placed = website.placed,
    unconfirmed = website.published - website.confirmed + warm_up.published - warm_up.confirmed,
    reached = s.watch.payments.came, books = read_books(s.folder), mails = s.watch.mails, parked = parked,
    waiting = queues.waiting(s.control, s.name), warm_up = warm_up,
  }
end

local function rows(s, sum, warm_up)
  local w = s.watch
  local website = s.website or { published = 0, confirmed = 0 }
  local list = {
    { "warm-up", warm_up.published, warm_up.confirmed, warm_up.delivered, "", "", "", "", sum.warm_up_lost },
  }
  local published, confirmed = website.published, website.confirmed
  for _, app in ipairs(w.apps) do
    list[#list + 1] = {
      app, published, confirmed, w:count(app, "ok"), w:count(app, "retry"), w:count(app, "dead_letter"),
      s.replayed and s.replayed[app] or 0, w:count(app, "duplicate"), sum.lost_by[app],
    }
    -- What an app has handled it has published to the next one, and waited for the confirm.
    published, confirmed = w:count(app, "ok"), w:count(app, "ok")
  end
  return list
end

local function show(s, sum, facts)
  local head, lines = count.table(rows(s, sum, facts.warm_up), screen.thousands)
  say("", paint("dim", head))
  say(table.concat(lines, "\n"), "")
  local parts = { ("%.0f s"):format(now() - s.began) }
  if s.killed then parts[#parts + 1] = "a kill -9" end
  if s.restart then parts[#parts + 1] = ("a broker away for %.0f s"):format(s.restart) end
  say(("  %s; %d orders paid twice, %d mailed twice; %s"):format(table.concat(parts, ", "), #sum.paid_twice,
    #sum.mailed_twice, paint("bold " .. (#sum.lost == 0 and "green" or "red"), #sum.lost .. " lost")))
end

-- ---- All of it --------------------------------------------------------------------------------------

local function keep_showing(s)
  local view = panel.new(s)
  while not s.over do
    s.watch:look()
    view:show(now())
    mr.sleep(0.1)
  end
end

-- The exit code.
local function finish(s, ok, thrown)
  s.over = true
  if s.website then s.website:close() end
  screen.close()
  if not ok and type(thrown) ~= "table" then complain("%s", tostring(thrown)) end
  if s.stopped then
    say "Stopped."
    return s.stopped
  end
  s.children.stop_all(12)
  local facts = gather(s)
  local sum = count.sum(facts)
  show(s, sum, facts)
  if not ok and type(thrown) == "table" then table.insert(sum.problems, 1, thrown.problem) end
  for _, problem in ipairs(sum.problems) do complain("%s", problem) end
  local good = ok and #sum.problems == 0
  say("", good and paint("bold green", "Nothing was lost.") or paint("bold red", "Not as it should be: see above."))
  if not good then s.keep = true end
  return good and 0 or 1
end

local function clean_up(s)
  s.children.stop_all(3)
  if s.control and s.control:is_open() then queues.clean(s.control, s.name) end
  for _, role in ipairs { "publishing", "control" } do
    if s[role] then s[role]:close(2) end
  end
  if s.keep or (os.getenv "KEEP" or "") ~= "" then
    say("Logs, books and mailbox: " .. s.folder)
  else
    os.execute("rm -rf " .. children.quote(s.folder))
  end
end

local function scene()
  local folder = make_folder()
  local name = broker and "shop" or ("moonrabbit-demo-%d-%d"):format(net.pid(), os.time() % 100000)
  local root = source .. "/../.."
  copy_scripts(folder)
  return {
    name = name, folder = folder, source = source, root = root, broker = broker, watch = watch.new(folder),
    children = children.new { root = root, folder = folder, environment = { SHOP = name, SHOP_DATA = folder } },
    rate = quick and 60 or 150, messages = quick and 2000 or 20000, rush = quick and 120 or 400,
    pace = quick and 0.1 or 1, limit = tonumber(os.getenv "MOONRABBIT_DEMO_SECONDS") or 150,
    began = now(), stage = 0, stages = story.stages, title = "",
  }
end

local function play(s)
  local parsed, wrong = mr.uri.parse(url)
  if not parsed then
    complain("AMQP_URL: %s", wrong)
    return 1
  end
  local log = io.open(s.folder .. "/director.log", "a")
  local function note(level, text) log:write(level, " ", text, "\n") end
  s.control = connect("control", note)
  s.publishing = s.control and connect("website", note)
  if not s.publishing then return 1 end
  local allowed, problem = queues.check(s.control, s.name)
  if not allowed then
    complain("%s", problem)
    return 1
  end
  mr.spawn(keep_showing, s)
  local ok, thrown = protect(story.play, s)
  return finish(s, ok, thrown)
end

local s = scene()
for name, code in pairs { INT = 130, TERM = 143, HUP = 129 } do
  native.signal(name, function() s.stopped = s.stopped or code end)
end

local code = 1
mr.run(function()
  local ok, result = protect(play, s)
  if ok then code = result else complain("%s", tostring(result)) end
  s.over = true
  screen.close()
  clean_up(s)
end)
os.exit(code)
