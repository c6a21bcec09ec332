-- examples/openresty/events: server-sent events from a queue, with its own nginx.conf, against a real broker: as bytes, and
-- as a page in a real browser.
local broker = require "support.broker"
local examples = require "support.nginx_examples"
local nginx = require "support.nginx"
local ok = broker.ok

local it = examples.it(it, pending)

describe("events of the examples #resty", function()
  local at = {}

  before_each(function() examples.open(at) end)
  after_each(function()
    if at.channel then at.channel:exchange_delete "events" end
    examples.close(at)
  end)

  local function publish(body, key)
    ok(at.channel:publish(body, { exchange = "events", routing_key = key or "news" }))
  end

  -- The worker's queue is there once something that is published comes through.
  local function publish_first(body, key)
    ok(at.channel:exchange_declare("events", { type = "topic", durable = true }))
    local route = { exchange = "events", routing_key = key }
    broker.eventually(function() return at.channel:publish(body, route) end, 10, "a queue is bound")
  end

  local function start(what)
    what = what or {}
    what.workers = what.workers or 1
    local server = examples.start(at, "events", what)
    publish_first("ready?", "k")
    return server
  end

  local function watching(n)
    broker.eventually(function() return at.server:request "/watching" == n .. "\n" end, 10, n .. " pages are open")
  end

  -- Opens the stream; fn(text_until, transport) reads it, `text_until(pattern)` until that has come.
  local function listen(fn)
    return at.server:request("/events", { version = "1.1", on = function(transport)
      local parts, tail = {}, "" -- tail: so much of it that a pattern is found across two reads
      local function text_until(pattern)
        while not tail:find(pattern) do
          parts[#parts + 1] = ok(transport:read(65536, 10))
          tail = tail:sub(-1000) .. parts[#parts]
        end
        return table.concat(parts)
      end
      text_until ": hello\n"
      fn(text_until, transport)
      transport:close()
    end })
  end

  it("are sent as their standard has them", function()
    start()
    listen(function(text_until)
      publish("one", "a key\nid: 2")
      local text = text_until "data: one\n\n"
      assert.matches("\r\nContent%-Type: text/event%-stream\r\n", text)
      assert.matches("\r\nCache%-Control: no%-store\r\n", text)
      assert.matches("event: message\nid: a key id: 2\ndata: one\n\n", text)
      publish "two\nlines"
      assert.matches("event: message\nid: news\ndata: two\ndata: lines\n\n", text_until "data: lines\n\n")
      publish "x\r\ny\rz"
      assert.matches("data: x\ndata: y\ndata: z\n\n", text_until "data: z\n\n")
    end)
  end)

  it("are followed by a sign of life when nothing comes", function()
    start { edits = { ["events.lua"] = { { "PING = 15", "PING = 1" } } } }
    listen(function(text_until) text_until ": still here\n\n" end)
  end)

  it("are lost, and counted, for a page that does not keep up", function()
    -- Not through the line, which stands still while nothing is waited for here.
    start { edits = { ["events.lua"] = { { "MOST = 100", "MOST = 3" } } }, env = { AMQP_URL = broker.url } }
    listen(function(text_until)
      local body = ("x"):rep(1000000)
      for _ = 1, 30 do publish(body) end -- more than the sockets take: it is not read
      publish("the last", "end")
      local queue = broker.ctl("list_bindings", "source_name", "destination_name"):match "events%s+(amq%.gen%S+)"
      broker.eventually(function()
        return broker.ctl("list_queues", "name", "messages"):find(queue .. "\t0\n", 1, true)
      end, 20, "the worker has them all")
      local text = text_until "data: the last\n\n"
      local lost, sent = 0, select(2, text:gsub("id: news\n", ""))
      for n in text:gmatch "event: lost\ndata: (%d+)\n\n" do lost = lost + tonumber(n) end
      assert.truthy(lost > 0)
      assert.equal(30, lost + sent)
    end)
  end)

  it("forget a browser that leaves", function()
    start()
    for _ = 1, 3 do listen(function() watching(1) end) end
    watching(0)
    assert.equal(200, (select(2, at.server:request "/ping")))
  end)

  it("do not keep a worker that is to leave", function()
    start()
    listen(function()
      local old = at.server:reload()
      nginx.gone(old, 10)
    end)
  end)

  describe("in a page", function()
    local chromium = nginx.shell "command -v chromium || command -v chromium-browser || command -v google-chrome"

    -- A page of the spec's own frames the example's, and reports what appears in its list.
    local watcher = [[
      location = /watch {
        default_type text/html;
        return 200 '<!DOCTYPE html><iframe src="/"></iframe><script>
          let last = "", reporting = false;
          // One report at a time, so that the newest is the last to arrive; one that is lost is sent again.
          const report = text => {
            reporting = true;
            fetch("/report", { method: "POST", body: text }).then(() => { last = text; }, () => { })
              .finally(() => { reporting = false; });
          };
          setInterval(() => {
            const page = document.querySelector("iframe").contentDocument;
            const state = page.getElementById("state");
            if (!state) return;
            const items = Array.from(page.querySelectorAll("#list li")).map(item => item.textContent);
            const text = [state.textContent, ...items].join("|");
            if (text !== last && !reporting) report(text);
          }, 50);
        </script>';
      }
      location = /report {
        content_by_lua_block {
          ngx.req.read_body()
          ngx.shared.report:set("text", ngx.req.get_body_data() or "")
        }
      }
      location = /reported { content_by_lua_block { ngx.print(ngx.shared.report:get "text" or "") } }
    ]]

    local function browse()
      return nginx.shell(("%s --headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        .. "--disable-background-networking --disable-component-update --disable-sync --user-data-dir='%s/browser' "
        .. "--remote-debugging-port=0 http://127.0.0.1:%d/watch > '%s/browser.log' 2>&1 & echo $!"):format(chromium,
        at.server.prefix, at.server.port, at.server.prefix))
    end

    local function reported() return (at.server:request "/reported") or "" end

    local function shows(text, seconds)
      broker.eventually(function() return reported() == text end, seconds or 10, text)
    end

    local function story()
      shows("open", 30)
      publish_first("hello <b>world</b>", "news")
      shows "open|newshello <b>world</b>"
      publish("two\nlines", "more")
      shows "open|moretwo\nlines|newshello <b>world</b>"
      for i = 1, 210 do publish(tostring(i)) end
      broker.eventually(function()
        return reported():find("open|news210|news209|", 1, true) and select(2, reported():gsub("|", "")) == 200
      end, 10, "the newest 200")
      -- The worker that serves the page goes; the browser comes back by itself.
      nginx.gone(at.server:reload(), 10)
      broker.eventually(function()
        return reported():find "^open" and at.channel:publish("again", { exchange = "events", routing_key = "news" })
          and reported():find("newsagain", 1, true)
      end, 20, "events after a reload")
    end

    it("appear in a real browser", function()
      if chromium == "" then return pending "chromium is not installed" end
      examples.start(at, "events", { http = "lua_shared_dict report 1m;", server = watcher })
      local browser = browse()
      local fine, problem = pcall(story)
      os.execute("kill " .. browser)
      pcall(nginx.gone, { tonumber(browser) }, 5)
      assert(fine, tostring(problem) .. "\nreported: " .. reported() .. "\n" .. at.server:log())
    end)
  end)
end)
