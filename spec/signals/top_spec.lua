-- moonrabbit top as a process: against servers that answer sense, nonsense or nothing, and in a real terminal (tmux).
local http_server = require "support.http_server"
local mr = require "moonrabbit"
local process = require "support.process"

local cjson_ok, cjson = pcall(require, "cjson")

local function has(program) return process.run({ "sh", "-c", "command -v " .. program }, { raw = true }).code == 0 end

describe("moonrabbit top", function()
  local servers, running, m

  before_each(function() servers, running, m = {}, {}, mr.metrics.new() end)
  after_each(function()
    for _, each in ipairs(running) do each:stop() end
    for _, each in ipairs(servers) do each.stop() end
  end)

  local function serve(answer)
    local server = http_server.start(answer)
    servers[#servers + 1] = server
    server.where = "127.0.0.1:" .. server.port
    return server
  end

  -- Metrics of a queue that gets ten messages more for each look.
  local function app()
    local observer = m:observer()
    return serve(function(request)
      if request.target ~= "/metrics" then return http_server.response(404, "no\n") end
      for _ = 1, 10 do
        observer.delivered("orders", {})
        observer.settled("orders", "ok", 0.02)
      end
      observer.settled("orders", "retry", 0.02)
      m.families.messages_in_flight:with("orders"):set(3)
      return http_server.response(200, m:text())
    end)
  end

  local function api(queues)
    return serve(function(request)
      if not request.target:find "^/api/queues/" then return http_server.response(404, "{}") end
      return http_server.response(200, ('{"items":%s,"page_count":1}'):format(queues))
    end)
  end

  local function start(...)
    local words = { "bin/moonrabbit", "top", "--interval", "0.2", "--timeout", "2", ... }
    running[#running + 1] = process.start(words, { env = { COLUMNS = "110" },
      unset = { "AMQP_URL", "MOONRABBIT_URL", "MOONRABBIT_MANAGEMENT_URL" } })
    return running[#running]
  end

  local function ended(child)
    local deadline = os.time() + 30
    while not child:code() do
      assert.is_true(os.time() < deadline, "it does not end")
      mr.sleep(0.02)
    end
    return child:code(), child:out(), child:err()
  end

  local function eventually(what, fn)
    local deadline = os.time() + 30
    while not fn() do
      assert.is_true(os.time() < deadline, what)
      mr.sleep(0.02)
    end
  end

  it("writes once what an app and the broker tell", function()
    local broker = api('[{"name":"orders","messages_ready":12,"messages_unacknowledged":3,"consumers":1},'
      .. '{"name":"other","messages_ready":1}]')
    local code, out, err = ended(start("--once", "--metrics", app().where, "--management", broker.uri))
    assert.equal(0, code, err)
    assert.equal("", err)
    local cells = {}
    for cell in out:match("\n(orders [^\n]*)"):gmatch "%S+" do cells[#cells + 1] = cell end
    assert.is_true(tonumber((cells[2]:gsub("k", ""))) > 0, out) -- in/s
    assert.equal("20ms", cells[8]:gsub("^%d+ms$", "20ms"))      -- p99
    assert.same({ "3", "12", "3", "-", "1" }, { cells[9], cells[10], cells[11], cells[12], cells[13] })
    assert.truthy(out:find("\nother ", 1, true), out)
    assert.falsy(out:find("\27", 1, true))
    assert.falsy(out:find("guest", 1, true))
  end)

  it("writes JSON for scripts", function()
    if not cjson_ok then pending "needs lua-cjson" return end
    local code, out = ended(start("--once", "--json", "--metrics", app().where, "--no-management", "--queue", "ord"))
    assert.equal(0, code)
    local found = cjson.decode(out)
    assert.equal(1, #found.queues)
    local queue = found.queues[1]
    assert.same({ "orders", 3 }, { queue.queue, queue.in_flight })
    assert.is_true(queue.delivered_rate > 0 and queue.retry_rate > 0 and queue.p99 > 0)
    assert.equal(2, queue.retries)
    assert.is_true(found.metrics[1].ok)
    assert.is_nil(found.management)
    code, out = ended(start("--once", "--json", "--metrics", app().where, "--no-management", "--queue", "nothing"))
    assert.equal(0, code)
    assert.truthy(out:find('"queues":[]', 1, true), out)
  end)

  it("says what is no page of metrics, and with which code it ends", function()
    local html = serve(function() return http_server.response(200, "<html>\n") end)
    local others = serve(function() return http_server.response(200, "go_goroutines 8\n") end)
    local broken = serve(function() return http_server.response(200, 'moonrabbit_connections{a="b" 1\n') end)
    local none = serve(function() return http_server.response(404, "no\n") end)
    local noise = serve(function() return "SSH-2.0-x\r\n\r\n" end)
    for server, words in pairs {
      [html] = "line 1 is no metric: '<html>'", [others] = "no metrics of moonrabbit",
      [broken] = "line 1 is no metric", [none] = "/metrics answers 404", [noise] = "no HTTP",
    } do
      local code, out, err = ended(start("--once", "--no-management", "--metrics", server.where))
      assert.is_true(code == 1 or code == 3, tostring(code))
      assert.truthy(err:find(words, 1, true), err)
      assert.truthy(out:find("no queues are known", 1, true), out)
    end
    local code, _, err = ended(start("--once", "--no-management", "--metrics", "127.0.0.1:1"))
    assert.equal(3, code)
    assert.truthy(err:find("127.0.0.1:1: ", 1, true), err)
  end)

  it("goes on with one source where the other is away or refuses", function()
    local refusing = serve(function() return http_server.response(401,
      '{"error":"not_authorised","reason":"no rights"}') end)
    local code, out, err = ended(start("--once", "--metrics", app().where, "--management", refusing.uri))
    assert.equal(4, code)
    assert.truthy(err:find("no rights", 1, true), err)
    assert.truthy(out:find("\norders ", 1, true), out)
    local lying = serve(function() return http_server.response(200, "[1,2,") end)
    code, out = ended(start("--once", "--metrics", app().where, "--url", "amqp://127.0.0.1:1/", "--management",
      lying.uri))
    assert.equal(3, code)
    assert.truthy(out:find("\norders ", 1, true), out)
    -- What nobody asked for by name may be away.
    local broker = api '[{"name":"orders","messages_ready":12}]'
    code, out = ended(start("--once", "--management", broker.uri, "--sort", "ready"))
    assert.equal(0, code)
    assert.truthy(out:find("\norders ", 1, true), out)
  end)

  it("refuses what it cannot do, before it asks anybody", function()
    for _, words in ipairs {
      { "--metrics", "amqp://x" }, { "--interval", "0" }, { "--interval", "x" }, { "--sort", "size" },
        { "--management", "x" },
      { "--url", "http://x/" }, { "extra" },
    } do
      local child = start("--once", (unpack or table.unpack)(words)) -- luacheck: ignore 143 113
      local code, _, err = ended(child)
      assert.equal(2, code, table.concat(words, " ") .. err)
    end
  end)

  it("writes a table every interval where there is no terminal, and ends on a signal", function()
    local server = app()
    local child = start("--metrics", server.where, "--no-management")
    eventually("no third table", function() return select(2, child:out():gsub("QUEUE", "")) >= 3 end)
    child:signal "INT"
    local code, out = ended(child)
    assert.equal(130, code)
    assert.falsy(out:find("\27", 1, true))
  end)

  it("ends on a signal while nobody answers", function()
    local silent = serve(function() return nil end)
    local child = start("--metrics", silent.where, "--no-management", "--timeout", "60")
    eventually("nobody asked", function() return #silent.requests > 0 end)
    child:signal "TERM"
    assert.equal(143, (ended(child)))
  end)

  -- ---- In a terminal --------------------------------------------------------------------------------

  local it_shows = has "tmux" and it or function(name) pending(name .. ": needs tmux", function() end) end

  -- For each terminal a server of its own: one that was told to end may still take a client, and end with it.
  local servers_started, socket = 0, nil

  local function tmux(...)
    local result = process.run({ "tmux", "-L", socket, "-f", "/dev/null", ... }, { raw = true,
      env = { TERM = "xterm" } })
    assert.equal(0, result.code, result.err)
    return result.out
  end

  local function screen() return tmux("capture-pane", "-p", "-t", "top") end

  local function shows(words)
    local last
    eventually("the screen never showed: " .. words, function()
      last = screen()
      return last:find(words, 1, true)
    end)
    return last
  end

  -- A shell in a terminal of 100 columns, in which top is started.
  local function terminal(width, ...)
    servers_started = servers_started + 1
    socket = ("moonrabbit-spec-%d-%d"):format(require("moonrabbit.net").pid(), servers_started)
    tmux("new-session", "-d", "-s", "top", "-x", tostring(width), "-y", "20", "env PS1='ready> ' sh")
    shows "ready>"
    local words = { "bin/moonrabbit", "top", "--interval", "0.2", "--no-management", ... }
    local path = process.file(process.command(words, { timeout = false }) .. "\n")
    running[#running + 1] = { stop = function()
      process.run({ "tmux", "-L", socket, "kill-server" }, { raw = true })
      os.remove(path)
    end }
    tmux("send-keys", "-t", "top", "stty -g > " .. path .. ".before; sh " .. path, "Enter")
    return path
  end

  -- A shell that was interrupted forgets the rest of its line, so this is another one.
  local function terminal_is_as_before(path, code)
    -- Once the shell asks again: before, the keys are the program's, or nobody's.
    eventually("it stays", function()
      return tmux("display-message", "-p", "-t", "top", "#{alternate_on}") == "0\n" and screen():find "ready>%s*$"
    end)
    tmux("send-keys", "-t", "top", "echo \"ended $?\"; stty -g > " .. path .. ".after", "Enter")
    shows("ended " .. code)
    eventually("no stty", function() return (process.slurp(path .. ".after") or "") ~= "" end)
    assert.equal(process.slurp(path .. ".before"), process.slurp(path .. ".after"))
    os.remove(path .. ".before")
    os.remove(path .. ".after")
    assert.truthy(screen():find("ready>", 1, true)) -- what was there before
    assert.equal("1\n", tmux("display-message", "-p", "-t", "top", "#{cursor_flag}"))
    assert.equal("0\n", tmux("display-message", "-p", "-t", "top", "#{alternate_on}"))
  end

  it_shows("fills a terminal, obeys its keys, and gives it back", function()
    local server = app()
    local path = terminal(100, "--metrics", server.where)
    shows "\norders "
    shows "*IN/s"
    tmux("send-keys", "-t", "top", "s")
    shows "*OK/s"
    tmux("send-keys", "-t", "top", "x")     -- means nothing
    tmux("send-keys", "-t", "top", "Left")  -- neither do sequences
    tmux("send-keys", "-t", "top", "r")
    tmux("send-keys", "-t", "top", "s")
    shows "*RETRY/s"
    tmux("send-keys", "-t", "top", "q")
    terminal_is_as_before(path, 0)
  end)

  it_shows("follows the width of the terminal, and a server that goes and comes back", function()
    local server = app()
    local path = terminal(100, "--metrics", server.where)
    shows "\norders "
    shows "P99"
    tmux("resize-window", "-t", "top", "-x", "40", "-y", "12")
    eventually("the columns stay", function() return not screen():find("P99", 1, true) end)
    for line in screen():gmatch "[^\n]+" do assert.is_true(#line <= 40 + 4, line) end
    tmux("resize-window", "-t", "top", "-x", "100", "-y", "12")
    shows "P99"
    local where = server.port
    server.stop()
    shows "no queues are known"
    shows("metrics       127.0.0.1:" .. where .. ": ")
    local again = assert(require("moonrabbit.metrics").serve { metrics = m, address = "127.0.0.1:" .. where })
    shows "\norders "
    again:close()
    tmux("send-keys", "-t", "top", "C-c")
    terminal_is_as_before(path, 130)
  end)
end)
