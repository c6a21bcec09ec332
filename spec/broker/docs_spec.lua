-- Every block of Lua in the README and the guides runs. One that has no `require "moonrabbit"` of its
-- own is a fragment: it is given a connection and a channel. Those of the guide that return an app are run by
-- `moonrabbit run` too, until they consume, and are then told to stop.
local broker = require "support.broker"
local pages = require "support.pages"
local process = require "support.process"

local url = broker.url

local fragment = [[
local moonrabbit = require "moonrabbit"
local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL"))
local ch = assert(conn:channel { confirm = true, prefetch = 100 })
assert(ch:queue_declare("orders", { durable = true }))
]]

-- What a block of each language is: "runs" and "commands" are checked below, the others are to be read only.
local languages = {
  lua = "runs", sh = "commands", json = "read", text = "read", nginx = "read", mermaid = "read", [""] = "read",
}

local function run(code)
  if not code:find 'require%(?%s*"moonrabbit"' then code = fragment .. code end
  local path = process.file(code)
  local result = process.run({ path }, { env = { AMQP_URL = url }, timeout = 20 })
  os.remove(path)
  return result
end

local function runs_as_app(code)
  local path = process.file(code)
  local running = process.start({ "bin/moonrabbit", "run", path }, { env = { AMQP_URL = url } })
  for _ = 1, 400 do
    if running:code() or running:err():find("' runs", 1, true) then break end
    process.sleep(0.05)
  end
  running:signal "TERM"
  local ended, text = running:wait(20), running:err()
  running:stop()
  os.remove(path)
  assert.truthy(text:find("' runs", 1, true), text)
  assert.equal(0, ended, text)
end

describe("the documentation #smoke", function()
  local total = 0

  -- The blocks share queues.
  local function clean()
    if broker.not_ours() then return end
    for _, queue in ipairs { "hello", "orders", "double" } do
      process.run({ "bin/moonrabbit", "delete", "queue", queue }, { env = { AMQP_URL = url } })
    end
  end
  setup(clean)
  teardown(clean)

  local it_runs = broker.it_unless(it, pending, broker.not_ours())

  for _, page in ipairs(pages.all()) do
    for _, block in ipairs(pages.read(page)) do
      if languages[block.language] == "runs" then
        total = total + 1
        it_runs(("runs: %s, line %d"):format(page, block.line), function()
          local result = run(block.code)
          assert.equal("", result.err)
          assert.equal(0, result.code)
        end)
      end
      if page == "docs/guide.md" and block.code:find("return mr.app", 1, true) then
        it_runs(("moonrabbit run: %s, line %d"):format(page, block.line), function() runs_as_app(block.code) end)
      end
    end
  end

  it("has blocks to run", function() assert.truthy(total >= 50, total) end)

  it_runs("would fail with a block that is broken", function()
    assert.not_equal(0, run("ch:publish(").code)
    assert.not_equal(0, run('assert(ch:publish("x", { routing_key = "no such queue" }))').code)
    local in_a_task = 'local mr = require "moonrabbit"\nmr.spawn(function() error "in a task" end)\nmr.sleep(0)'
    assert.not_equal("", run(in_a_task).err)
  end)

  it("has no block in a language that nobody checks", function()
    for _, page in ipairs(pages.all()) do
      for _, block in ipairs(pages.read(page)) do
        assert.truthy(languages[block.language], ("%s:%d: %s"):format(page, block.line, block.language))
      end
    end
  end)

  it("would see a block that is written differently", function()
    for _, text in ipairs { "```Lua\n```\n", "  ```lua\n  ```\n", "~~~lua\n~~~\n", "```lua\n", "```lua x\n```\n" } do
      assert.has_error(function() pages.blocks(text, "page") end)
    end
    assert.same({ { line = 2, language = "sh", code = "ls\n" } }, pages.blocks("a\n```sh\nls\n```\n", "page"))
  end)

  -- The anchors of a page's headings, as GitHub makes them.
  local function anchors(text)
    local set = {}
    for heading in ("\n" .. text):gmatch "\n#+ ([^\n]+)" do
      set[(heading:lower():gsub("[^%w%s_\128-\255-]", ""):gsub("%s", "-"))] = true
    end
    return set
  end

  it("has no link to a file, or a section, that is not there", function()
    for _, page in ipairs(pages.all()) do
      local folder = page:match "^(.*/)" or ""
      for target in (process.slurp(page) or ""):gmatch "%]%(([^)%s]+)%)" do
        local path, anchor = target:match "^([^#]*)#?(.*)$"
        if not target:find "^https?://" then
          local text = process.slurp(path == "" and page or folder .. path)
          local there = text or os.execute("test -d " .. process.quote(folder .. path))
          assert.truthy(there == true or there == 0 or text, page .. " links to " .. target)
          if anchor ~= "" and path:find "%.md$" or path == "" then
            assert.truthy(anchors(text)[anchor], page .. " links to " .. target)
          end
        end
      end
    end
  end)
end)
